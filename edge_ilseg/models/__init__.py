"""Networks: backbones, heads, and a classifier that grows."""
