"""The transformer in plain PyTorch: configuration, attention, loss, initialisation."""
