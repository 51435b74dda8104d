"""From a torch function on ShardTensors to what handles it."""
