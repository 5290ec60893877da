"""Features of the frozen half of a model: made from images, and kept on disk."""

from fleet.features.cache import FeatureCache
from fleet.features.source import FeatureSource, cache_directory, features_key, run_in_parts

__all__ = ["FeatureCache", "FeatureSource", "cache_directory", "features_key", "run_in_parts"]
