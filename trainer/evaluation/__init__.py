"""What the latents do: readings by every anchor, controls, and figures with intervals."""
