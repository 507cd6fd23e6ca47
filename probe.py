"""Measure a frozen backbone: python probe.py checkpoint=runs/my-run probe=knn"""

from selfsight.cli import main

if __name__ == "__main__":
    raise SystemExit(main("probe"))
