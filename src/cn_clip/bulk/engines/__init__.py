"""What runs shards: processes of this machine, or Ray. Each calls the same function."""
