"""Files of adapters: finding and checking them, and saves that leave the old files or the new ones."""
