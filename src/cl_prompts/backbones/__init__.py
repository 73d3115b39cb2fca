"""How prompts enter and leave a transformer. Knows transformers, knows no method."""
