"""The seed architectures, written on the operators."""
