"""Where the parts meet: what the entry scripts call."""
