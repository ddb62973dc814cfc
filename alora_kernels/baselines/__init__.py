"""What ALoRA is compared with: other ways to share low-rank matrices, as formulas, layers and whole methods."""
