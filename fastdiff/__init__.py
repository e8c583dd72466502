"""fastdiff: the part of diffusion sampling that is not the network, as one fused operation."""

__version__ = "0.1.0"
