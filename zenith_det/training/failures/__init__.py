"""What goes wrong while training: steps that are not finite, divergence, and the way back."""
