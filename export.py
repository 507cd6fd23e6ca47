"""Write a folder that timm opens: python export.py checkpoint=runs/my-run out=my-model"""

from selfsight.cli import main

if __name__ == "__main__":
    raise SystemExit(main("export"))
