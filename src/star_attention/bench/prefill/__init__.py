"""`bench prefill`: encoding with Star Attention, dense attention and the official scheme."""
