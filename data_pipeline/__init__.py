"""Raw archives -> documents -> shards -> batches. Never imports trainer."""
