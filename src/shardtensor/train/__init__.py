"""Training: start up, weights in sync, gradients summed, FSDP2 and tensor parallelism beside it."""
