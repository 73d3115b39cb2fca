"""Files of adapters: where they are, whether they are whole, and writes that leave the old content or the new."""
