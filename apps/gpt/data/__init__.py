"""Text as token shards: prepared once, mapped into memory, cut over the ranks."""
