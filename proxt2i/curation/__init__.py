"""Curation: img2dataset shards or a folder of images -> filtered, deduplicated, scored, captioned shards. docs/curation.md.

Nothing heavy is imported here: worker processes import `samples`, which needs Pillow and numpy only.
"""
