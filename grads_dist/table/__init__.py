"""The score table: written by every rank in shards, merged to one."""
