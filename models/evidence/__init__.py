"""What KVSmooth does to the checkpoint in the box, measured on scenes that it never saw: the figures and plots of docs/evidence.md.

runs.py captions scenes and judges the captions, rows.py says which settings are compared, page.py and plots.py write the page.
"""
