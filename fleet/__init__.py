"""Fine-tune mobile CNNs within a device's memory, alone or in a fleet."""
