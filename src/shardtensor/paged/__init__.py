"""A sample larger than the device, on one device: ranks in turn, their memory in files."""
