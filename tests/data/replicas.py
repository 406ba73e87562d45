"""Small replicas of the real data sets, in their published formats, with photos and masks of the built-in scenes."""

import json
import pathlib
import pickle

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from alto_jax.data.scenes import Scenes, ScenesConfig
from alto_jax.mllm import text

SIZE = 64
IMAGES = "images/mscoco/images/train2014"


def scenes(count: int):
    """The first scenes that have objects."""
    source = Scenes(ScenesConfig(image_size=SIZE, num_scenes=count))
    return [source[index] for index in range(count)]


def runs(mask: np.ndarray, form: str):
    """A COCO segmentation of a bool mask: "compressed", "counts" (a list) or "polygon" (its box)."""
    if form == "polygon":
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x0, x1, y0, y1 = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]
    if form == "compressed":
        counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    else:
        flat = mask.ravel(order="F").astype(np.int8)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
        counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        counts = counts[:-1] if counts[-1] == 0 else counts
    return {"size": list(mask.shape), "counts": counts}


def shown(mask: np.ndarray, form: str) -> np.ndarray:
    """The mask that a segmentation in this form shows: the mask itself, or its box."""
    if form != "polygon":
        return mask
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.zeros_like(mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def write_coco(root: pathlib.Path, count: int = 6):
    """Images and annotations of COCO: returns (images, annotations, masks by annotation id)."""
    folder = root / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations, masks = [], [], {}
    for number, scene in enumerate(scenes(count)):
        name = f"COCO_train2014_{number + 1:012d}.jpg"
        Image.fromarray(scene.image).save(folder / name, quality=95)
        images.append({"id": number + 1, "file_name": name, "height": SIZE, "width": SIZE})
        for k in range(min(2, len(scene.objects))):
            mask, form = scene.union([k]) > 0, ("compressed", "counts", "polygon")[(number + k) % 3]
            annotation = {"id": 10 * (number + 1) + k, "image_id": number + 1, "segmentation": runs(mask, form)}
            annotations.append({**annotation, "iscrowd": 0, "category_id": 1, "area": float(mask.sum()),
                                "bbox": list(map(float, scene.objects[k].bbox))})  # fmt: skip
            masks[annotation["id"]] = shown(mask, form)
    return images, annotations, masks


def sentences(*texts: str):
    return [{"sent": t, "raw": t, "tokens": t.split(), "sent_id": i} for i, t in enumerate(texts)]


def write_refer(root: pathlib.Path, dataset: str = "refcoco", splits=("val", "testA", "train"), count: int = 6) -> dict:
    """refs(…).p or grefs(unc).json with instances.json; returns key → mask."""
    images, annotations, masks = write_coco(root, count)
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(content))
    refs, expected = [], {}
    general = dataset == "grefcoco"
    for number, image in enumerate(images):
        mine = [a["id"] for a in annotations if a["image_id"] == image["id"]]
        split = splits[number % len(splits)]
        cases = [mine, [-1]] if general else [mine[:1]]
        for ids in cases:
            ref = {"ref_id": len(refs), "image_id": image["id"], "ann_id": ids if general else ids[0], "split": split}
            ref |= {"file_name": "wrong_on_purpose_12.jpg", "category_id": 1, "sent_ids": [0, 1]}
            refs.append(ref | {"sentences": sentences(f"the thing {number}", f"thing on the left {number}")})
            union = np.zeros((SIZE, SIZE), bool)
            for i in ids:
                union |= masks.get(i, False)
            expected[f"{dataset}/{split}/{ref['ref_id']}"] = union
    if general:
        (folder / "grefs(unc).json").write_text(json.dumps(refs))
    else:
        by = "umd" if dataset == "refcocog" else "unc"
        (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    return expected


def write_psalm(root: pathlib.Path, dataset: str = "refcoco", split: str = "val", no_target: bool = False) -> list:
    """The PSALM-converted JSON of one split; returns the masks in order."""
    images, annotations, masks = write_coco(root)
    entries, expected = [], []
    for number, image in enumerate(images):
        anns = [] if no_target and number % 2 else [a for a in annotations if a["image_id"] == image["id"]]
        entry = {"image": image["file_name"], "image_info": image, "anns": anns, "new_img_id": number}
        entries.append(entry | {"instruction": sentences(f"object {number}", "that one", "it")})
        union = np.zeros((SIZE, SIZE), bool)
        for a in anns:
            union |= masks[a["id"]]
        expected.append(union)
    (root / dataset).mkdir(exist_ok=True)
    (root / dataset / f"{dataset}_{split}.json").write_text(json.dumps(entries))
    return expected


def write_refcocom(root: pathlib.Path, split: str = "val_part_only") -> list:
    images, annotations, masks = write_coco(root)
    for name in ("annotations", "masks"):
        (root / "refcocom" / name).mkdir(parents=True, exist_ok=True)
    entries = []
    for image, annotation in zip(images, annotations):
        image = next(i for i in images if i["id"] == annotation["image_id"])
        segment = f"{annotation['id']}_part"
        Image.fromarray(masks[annotation["id"]]).save(root / "refcocom" / "masks" / f"{segment}.png")
        entries.append({"img_name": image["file_name"], "segment_id": segment, "sentences": ["the leg", "left leg"]})
    (root / "refcocom" / "annotations" / f"{split}.json").write_text(json.dumps(entries))
    return [masks[a["id"]] for a, _ in zip(annotations, images)]


def write_label_maps(root: pathlib.Path, name: str, count: int = 4) -> None:
    """Images and label maps of A-150, PC-59 or PAS-20 in root/images and root/labels."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes(count)):
        label = np.zeros((SIZE, SIZE), np.uint8)
        for k in range(len(scene.objects)):
            label[scene.union([k]) > 0] = 1 + (3 * number + 5 * k) % 20
        if name != "a150":
            label[:, :2] = 255
        Image.fromarray(scene.image).save(root / "images" / f"img_{number}.jpg")
        image = Image.fromarray(label)
        if name == "pas20":
            image = image.convert("P")
            image.putdata(label.ravel().tolist())
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
        image.save(root / "labels" / f"img_{number}.png")


SA1B_VALIDATION = (534, 757)  # ids whose names' hash puts them on the validation list


def write_sa1b(root: pathlib.Path, count: int = 4, size: int = SIZE, ids=()) -> None:
    """A flat SA-1B folder of images 0, 1, … or of the ids."""
    root.mkdir(parents=True, exist_ok=True)
    ids = ids or range(count)
    for number, scene in zip(ids, scenes(len(ids)), strict=True):
        Image.fromarray(scene.image).save(root / f"sa_{number}.jpg", quality=95)
        info = {"image_id": number, "width": size, "height": size, "file_name": f"sa_{number}.jpg"}
        annotations = []
        for k, shape in enumerate(scene.objects):
            rle = runs(shape.mask, "compressed")
            annotations.append({"id": k, "area": shape.area, "bbox": list(shape.bbox), "segmentation": rle,
                                "predicted_iou": 0.9, "stability_score": 0.9})  # fmt: skip
        (root / f"sa_{number}.json").write_text(json.dumps({"image": info, "annotations": annotations}))


def write_conversations(root: pathlib.Path, count: int = 6, repeat: float = 1) -> pathlib.Path:
    """A stage-2/3 meta file with its JSONL: fixed, adaptive, two masks, a box prompt, and a yes/no question."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes(count)):
        Image.fromarray(scene.image).save(root / "images" / f"{number}.jpg", quality=95)
        masks = []
        for k in range(2 if number % 3 == 2 and len(scene.objects) > 1 else 1):
            masks.append(f"masks/{number}_{k}.png")
            Image.fromarray(scene.union([k])).save(root / masks[-1])
        adaptive = bool(number % 2)
        phrase = "<box>[[10,20,500,600]]</box>" if number % 3 == 1 else f"thing {number}"
        answers = " and ".join([text.answer(adaptive=adaptive).rstrip(".")] * len(masks))
        turns = [{"from": "human", "value": "<image>\n" + text.question(phrase, adaptive=adaptive)}]
        turns.append({"from": "gpt", "value": answers + "."})
        mask = masks if len(masks) > 1 else masks[0]
        lines.append({"image": f"images/{number}.jpg", "mask": mask, "conversations": turns})
    (root / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = {"root": ".", "annotation": "chat.jsonl", "data_augment": False, "repeat_time": repeat, "length": count}
    (root / "meta.json").write_text(json.dumps({"sample": entry}))
    return root / "meta.json"


def write_all(root: pathlib.Path) -> None:
    """Every referring and open-vocabulary data set with its training and val split, and PSALM's in root/psalm."""
    from alto_jax.data import open_vocab

    for dataset in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        write_refer(root, dataset, splits=("val", "train"))
        for split in ("val", "train"):
            (root / "psalm").mkdir(exist_ok=True)
            write_psalm(root / "psalm", dataset, split, no_target=dataset == "grefcoco")
    for part in ("val_part_only", "val_object_part"):
        write_refcocom(root, part)
    for name in open_vocab.LABEL_MAPS:
        write_label_maps(root / name, name)
        folders = root / name / "images", root / name / "labels", root / "open_vocab"
        open_vocab.build(name, *folders, names=[f"thing {i}" for i in range(20)] if name == "a150" else None)


def write_questions(root) -> None:
    """POPE, VQAv2 and MME."""
    folder = root / "coco" / "val2014"
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes(3)):
        Image.fromarray(scene.image).save(folder / f"COCO_val2014_{number:012d}.jpg")
    (root / "pope").mkdir(exist_ok=True)
    for split in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": i,
                "image": f"COCO_val2014_{i:012d}.jpg",
                "text": "Is there a dog?",
                "label": ("yes", "no")[i % 2],
            }
            for i in range(3)
        ]
        (root / "pope" / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    (root / "vqav2").mkdir(exist_ok=True)
    questions = [{"question_id": i, "image_id": i, "question": "What colour?"} for i in range(3)]
    answers = [{"question_id": i, "answers": [{"answer": "red"}] * 10, "answer_type": "other"} for i in range(3)]
    names = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
    for name, content in zip(names, ({"questions": questions}, {"annotations": answers})):
        (root / "vqav2" / name).write_text(json.dumps(content))
    for category in ("existence", "code_reasoning"):
        (root / "mme" / category).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes(2)):
            Image.fromarray(scene.image).save(root / "mme" / category / f"{number}.png")
            (root / "mme" / category / f"{number}.txt").write_text("Is it here?\tYes\nIs it gone?\tNo\n")


def write_reason_seg(root: pathlib.Path, splits=("train", "val", "test"), count: int = 3) -> None:
    """ReasonSeg: a target, an inner region that is ignored, and a flag; texts in UTF-8 and in Windows' encoding."""
    for split in splits:
        folder = root / "ReasonSeg" / split
        folder.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes(count)):
            Image.fromarray(scene.image).save(folder / f"{split}_{number}.jpg", quality=95)
            corners = lambda a, b: [[a, a], [b + 0.6, a], [b, b], [a, b]]
            shapes = [{"label": "ignore", "points": corners(20 + number, 30)}, {"label": "flag", "points": []},
                      {"label": "target", "points": corners(8, 40 + number)}]  # fmt: skip
            texts = [f"what keeps caf\u00e9 {number} dry?", "the thing that keeps it dry"][: 1 + (split == "train")]
            content = json.dumps({"text": texts, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
            (folder / f"{split}_{number}.json").write_bytes(content.encode("cp1252" if number else "utf-8"))


def write_refcoco_m(root: pathlib.Path) -> dict:
    """RefCOCO-M as a parquet file; returns id → mask."""
    import pyarrow
    from pyarrow import parquet

    images, annotations, masks = write_coco(root)
    rows, expected = [], {}
    for image in images:
        samples = []
        for annotation in (a for a in annotations if a["image_id"] == image["id"]):
            mask = runs(masks[annotation["id"]], "compressed")
            samples.append({"id": annotation["id"], "sentences": ["the one", "that one"], "mask": mask,
                            "bbox": [0.0, 0.0, 1.0, 1.0], "category": "thing"})  # fmt: skip
            expected[annotation["id"]] = masks[annotation["id"]]
        rows.append({"image_id": image["id"], "file_name": image["file_name"], "samples": samples})
    folder = root / "refcoco-m" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    return expected


def write_mask_perception(root: pathlib.Path, count: int = 3) -> None:
    images, annotations, masks = write_coco(root)
    (root / "mask_perception" / "mask").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, annotation in enumerate(annotations[:count]):
        image = next(i for i in images if i["id"] == annotation["image_id"])
        Image.fromarray(masks[annotation["id"]]).save(root / "mask_perception" / "mask" / f"{number}.png")
        question = "What is <|mt_start|><|mt_12|><|mt_7|><|mt_end|>?\nA. a cat\nB. a dog"
        entries.append({"image": f"train2014/{image['file_name']}", "mask": f"mask/{number}.png", "question": question,
                        "answer": "B. a dog"})  # fmt: skip
    (root / "mask_perception" / "mask_perception.json").write_text(json.dumps(entries))


def write_benchmarks(root: pathlib.Path) -> None:
    """Every benchmark in one data folder, and the training splits of the referring ones."""
    from alto_jax.data import open_vocab

    for dataset in ("refcoco", "refcoco+", "grefcoco"):
        write_refer(root, dataset, splits=("val", "testA", "testB", "train"), count=8)
    write_refer(root, "refcocog", splits=("val", "test", "train"))
    for part in ("part_only", "object_part"):
        for split in ("val", "testA", "testB"):
            write_refcocom(root, f"{split}_{part}")
    for name in open_vocab.LABEL_MAPS:
        write_label_maps(root / name, name)
        folders = root / name / "images", root / name / "labels", root / "open_vocab"
        open_vocab.build(name, *folders, names=[f"thing {i}" for i in range(20)] if name == "a150" else None)
    write_sa1b(root / "sa1b", ids=(0, 1, *SA1B_VALIDATION))
    write_reason_seg(root)
    write_refcoco_m(root)
    write_mask_perception(root)
    write_questions(root)
