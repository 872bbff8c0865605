"""The multi-scale gradient-ratio target of SAR-JEPA."""
