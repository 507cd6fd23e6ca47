"""The COCO recipe writes no object under 255, which means ignore."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_largest_254_of_many_objects_are_kept(tmp_path):
    spec = importlib.util.spec_from_file_location("coco", ROOT / "data/coco.py")
    coco = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coco)
    Image.fromarray(np.zeros((10, 30), np.uint8)).save(tmp_path / "7.png")
    single = [{"size": [10, 30], "counts": [i, 1, 299 - i]} for i in range(300)]  # one pixel each
    notes = [{"image_id": 7, "segmentation": s, "area": 300 - i} for i, s in enumerate(single)]
    content = {"images": [{"id": 7, "file_name": "7.png", "height": 10, "width": 30}], "annotations": notes}
    (tmp_path / "notes.json").write_text(json.dumps(content))
    raw = coco.Coco(str(tmp_path), str(tmp_path / "notes.json")).read(0)
    ids = np.asarray(Image.open(io.BytesIO(raw.objects))).T.ravel()  # run lengths go down the columns
    assert ids[:254].tolist() == list(range(1, 255)) and not ids[254:].any()
