"""What is recorded of each batch: its line of results.jsonl, its curves and pictures."""
import math

import torch

from harness import tensorboard
from harness.encoder import precision_in_use
from models.batch_renorm import brn_layers


class TrainingError(Exception):
    """Training that cannot go on, such as a loss that is no longer a number."""
    exit_status = 1


def record(folder, learner, rows, batches, steps, images, labels, test):
    """Writes what there is to tell of one batch; returns its line of results.jsonl, a dict.

    folder: a RunFolder; rows: the lines of earlier batches; batches: how many are to be learned; steps: what
    Learner.learn returned; images, labels: the batch; test: what utils.evaluate said after it.
    """
    i = len(rows)
    losses, corrects, sizes = (t.double().cpu() for t in steps)
    first_step = rows[-1]["train_steps"] if rows else 0

    row = {"batch": i}
    row |= accuracies(losses, corrects, sizes, test)
    row |= {"n_train": len(labels), "classes_seen": int(classes_met(learner).sum())}
    row |= {"memory_size": len(learner.memory), "train_steps": first_step + len(losses)}
    row |= {f"seconds_{part}": round(seconds, 4) for part, seconds in learner.clock.take().items()}
    row |= per_class(learner, labels, test)
    row |= {"batches": len(folder.data["batches"]) - folder.config.start_batch, "data": folder.data["data"]}
    row |= {"device": device_name(learner.device), "matmul_precision": precision_in_use()}
    row |= {"precision": "bf16"} if learner.net.bf16 else {}
    rows = [*rows, row]
    row |= {"forgetting": forgetting(rows), "kept_mb": kept_mb(learner)}
    row |= of_variants(learner)
    folder.write_row(row)

    writer = folder.writer
    head = learner.head
    memory = learner.memory
    confusion = test["confusion"]
    tensorboard.write_steps(writer, first_step, losses.tolist(), (corrects / sizes).tolist())
    tensorboard.write_batch(writer, row, confusion, head, memory, brn_layers(learner.net))
    if tensorboard.picture_due(i, batches):
        memory_has_images = learner.net.latent_layer_num < 0
        tensorboard.write_pictures(writer, rows, batches, confusion, head, memory, images, memory_has_images,
                                   names=folder.data["classes"])
    if i + 1 == batches:
        tensorboard.write_hparams(writer, folder.config, rows)
    return row


def check_losses(losses, i):
    """Raises TrainingError if one of the losses of batch i, a tensor, is no finite number."""
    if losses.isfinite().all():
        return
    bad = losses[~losses.isfinite()][0]
    setting = "inc_lr" if i else "init_lr"
    kept = "; the last checkpoint is kept" if i else ""
    raise TrainingError(f"the training loss became {bad:g} in batch {i}, which is taken back: lower the "
                        f"learning rate ({setting} of a run, started over with --fresh{kept})")


def classes_met(learner):
    """Which classes the learner has met, bool (rows of its head,), on the CPU."""
    return (learner.head.past_j > 0).cpu()


def accuracies(losses, corrects, sizes, test):
    """Test and training accuracy and loss. losses, corrects, sizes: float64, one value a training step."""
    return {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "train_accuracy": (corrects.sum() / sizes.sum()).item(),
        "train_loss": ((losses * sizes).sum() / sizes.sum()).item(),
    }


def per_class(learner, labels, test):
    """Which classes the batch held, and what is known of each class, and of those met so far, after it."""
    confusion = test["confusion"]
    met = classes_met(learner).nonzero()[:, 0]
    right = confusion.diagonal()[met].sum().item()
    n_seen = confusion[met].sum().item()
    return {
        "accuracy_seen": right / max(1, n_seen),
        "n_test_seen": n_seen,
        "per_class": [None if math.isnan(a) else round(a, 4) for a in test["per_class"]],
        "classes": torch.as_tensor(labels).unique().tolist(),
        "n_test": int(confusion.sum()),
    }


def of_variants(learner):
    """What only some methods have: saturated importances, latents out of the range of their bytes."""
    told = {}
    if learner.si.weights:
        told["si_saturated"] = saturated(learner.si)
    codec = learner.memory.state_dict().get("codec", {})
    if "clipped" in codec:
        told["rm_clipped"] = (codec["clipped"] / codec["coded"].clamp(min=1)).item()
    return told


def device_name(device):
    """The GPU's name; of a CPU, how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}"


def kept_mb(learner):
    """MB (10^6 bytes) of what a learner keeps for later batches beside its network: memory, head,
    importances, statistics."""
    kept = [learner.memory.state_dict(), learner.head.state_dict(), learner.si.state_dict()]
    if learner.beside is not None:
        kept.append(learner.beside.kept())
    return round(n_bytes(kept) / 1e6, 3)


def n_bytes(value):
    """Bytes of a tensor, or of all those in lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(n_bytes, value.values() if isinstance(value, dict) else value))


def saturated(si):
    """Share of the weights under Synaptic Intelligence whose importance is the largest allowed: 0..1."""
    at_most = sum((f >= si.max_f).sum().item() for f in si.importance)
    return at_most / sum(f.numel() for f in si.importance)


def forgetting(rows):
    """Best accuracy so far minus accuracy now, mean over the classes met that have test images: 0..1, or
    None.

    rows: lines of results.jsonl. What a class's accuracy was before it was met does not count.
    """
    met = {}        # class: the first row that has learned it
    for i, row in enumerate(rows):
        for j in row["classes"]:
            met.setdefault(j, i)

    lost = []
    for j, i in met.items():
        curve = [row["per_class"][j] for row in rows[i:]]
        if curve[-1] is not None:
            lost.append(max(a for a in curve if a is not None) - curve[-1])
    return sum(lost) / len(lost) if lost else None
