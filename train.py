"""Pretrain a backbone: python train.py objective=mae backbone=vit_b data=folder data.root=/d/images"""

from selfsight.cli import main

if __name__ == "__main__":
    raise SystemExit(main("train"))
