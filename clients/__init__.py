"""The Flower client: one local update on one device."""
