"""The Flower server: validate replies, aggregate unequal updates, step the model."""
