"""What tests share: tiny models, streams, a Hub on loopback, harnesses."""
