"""Models: item encoders (fusions), sequence encoders (backbones), the recommender and its losses."""
