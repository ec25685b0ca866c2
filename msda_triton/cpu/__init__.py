"""The operator on CPUs, in eager PyTorch or compiled by TorchInductor."""
