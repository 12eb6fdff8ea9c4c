"""What torch.compile makes of the norms in context."""
