"""A fleet on real machines: keys, certificates, and processes that are kept alive.

Nothing here knows PyTorch. Flower is imported where it is needed, inside functions:
a device's watch over its client does without it.
"""
