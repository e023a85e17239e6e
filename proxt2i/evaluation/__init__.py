"""What `python -m proxt2i.evaluate` does: prompts, samplers, drawing and scoring in units, statistics, tables and a page; portraits apart."""
