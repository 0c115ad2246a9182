#!/usr/bin/env bash
# The study's cuts of Tiny-ImageNet and CIFAR-10. In the directory of the datasets, which holds tiny-imagenet-200/:
#
#   bash DIR/docs/study/cuts.sh
#
# tiny_a/ and tiny_b/: 100 classes each, 100 + 20 images of each class; tiny_ab/: both; cifar10/: 1,000 + 200 images of
# each class; cat_dog/: two of its classes; asymmetric0/ to 2/: 200 images of each class, 40 % of five classes in the
# folder of a class that looks like theirs. The images are drawn at random.
set -euo pipefail

half=a
while read -r wnid; do # every other class into tiny_a and tiny_b
    mkdir -p tiny_$half/{train,val}/"$wnid"
    find "$PWD/tiny-imagenet-200/train/$wnid/images" -type f | shuf -n 100 |
        xargs -d '\n' ln -st tiny_$half/train/"$wnid"
    awk -v c="$wnid" -v d="$PWD/tiny-imagenet-200/val/images/" '$2 == c {print d $1}' \
        tiny-imagenet-200/val/val_annotations.txt | shuf -n 20 | xargs -d '\n' ln -st tiny_$half/val/"$wnid"
    if [[ $half == a ]]; then half=b; else half=a; fi
done <tiny-imagenet-200/wnids.txt
mkdir -p tiny_ab/{train,val}
ln -st tiny_ab/train "$PWD"/tiny_[ab]/train/*
ln -st tiny_ab/val "$PWD"/tiny_[ab]/val/*

python - <<'END'
import pathlib, random, torchvision

for part, count in (("train", 1000), ("val", 200)):
    images = torchvision.datasets.CIFAR10(".", train=part == "train", download=True)
    for label, name in enumerate(images.classes):
        folder = pathlib.Path("cifar10", part, name)
        folder.mkdir(parents=True)
        for i in random.sample([i for i, k in enumerate(images.targets) if k == label], count):
            images[i][0].save(folder / f"{i:05d}.jpg", quality=95)

for part in ("train", "val"):
    for name in ("cat", "dog"):
        link = pathlib.Path("cat_dog", part, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(pathlib.Path("cifar10", part, name).absolute())

wrong = {"truck": "automobile", "bird": "airplane", "cat": "dog", "dog": "cat", "deer": "horse"}
for seed in range(3):
    chance = random.Random(seed)
    for part, step in (("train", 5), ("val", 1)):
        for file in sorted(pathlib.Path("cifar10", part).absolute().glob("*/*.jpg"))[::step]:
            name = file.parent.name
            label = wrong.get(name, name) if part == "train" and chance.random() < 0.4 else name
            link = pathlib.Path(f"asymmetric{seed}", part, label, f"{name}_{file.name}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
END
