"""From raw files to tokenised shards: what `podwright data prepare` does."""
