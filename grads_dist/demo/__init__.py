"""The main job on a corpus and a model that need no download."""
