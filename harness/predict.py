"""--predict: the likeliest classes of image files, from a learner alone."""
import json
import os
from pathlib import Path

import numpy as np

from data_loader import DataError
from harness.console import say
from harness.records import classes_met
from streams.folder import SUFFIXES, entries, natural, read_image

CHUNK = 32      # images that are read and classified at a time, so that any number takes little memory
LIKELIEST = 3   # classes that are told of an image


def print_classes(learner, paths, as_json=False):
    """Prints a line for each image file, and for each one inside a folder: its likeliest classes.

    learner: of a run, from load_learner. as_json: the line is an object {"image": path, "classes": [{"class":
    name or number, "probability": 0..1}, ...]}. What cannot be read is told on stderr. Returns the exit
    status: 1 if there was any such thing.
    """
    unread = []
    files = []
    for path in map(Path, paths):
        inside = image_files(path, unread)
        if not inside and path not in unread:
            unread.append(path)
            say(f"{path} holds no images ({', '.join(SUFFIXES)}): name a folder that does")
        files += inside

    for k in range(0, len(files), CHUNK):
        read = []
        images = []
        for file in files[k:k + CHUNK]:
            try:
                images.append(read_image(file, learner.image_size))
                read.append(str(file))
            except DataError as error:
                unread.append(file)
                say(str(error))
        if read:
            for file, classes in zip(read, likeliest(learner, np.stack(images))):
                print(line(file, classes, as_json), flush=True)
    return 1 if unread else 0


def likeliest(learner, images):
    """[[(class, probability), ...], ...]: the likeliest classes of uint8 images (n, H, W, 3), best first.

    Of the classes met alone: the scores of the others mean nothing.
    """
    met = classes_met(learner)
    scores = learner.scores(images).double().masked_fill(~met, -float("inf"))
    names = learner.class_names or range(len(met))
    # by scores, since many probabilities may round to 0; of equal ones the first, as argmax has it
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :min(LIKELIEST, int(met.sum()))]
    probabilities = scores.softmax(1).gather(1, best)
    return [[(names[j], p) for j, p in zip(*of_image)]
            for of_image in zip(best.tolist(), probabilities.tolist())]


def line(file, classes, as_json):
    """What is printed of an image whose classes are [(class, probability), ...]."""
    if as_json:
        told = [{"class": name, "probability": p} for name, p in classes]
        return json.dumps({"image": file, "classes": told})
    return f"{file}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes)


def image_files(path, unread):
    """[path] of a file; of a folder, the images inside it and inside its folders, in natural order.

    unread: a list that gets each folder that cannot be read, which is told on stderr.
    """
    if not os.path.isdir(path):
        return [path]
    try:
        folders, files = entries(path)
    except DataError as error:
        unread.append(path)
        say(str(error))
        return []
    inside = [folder for folder in folders if not folder.is_symlink()]      # a link may lead back up
    inside += [file for file in files if file.suffix.lower() in SUFFIXES]
    return [file for entry in sorted(inside, key=natural) for file in image_files(entry, unread)]
