"""ImageNet weights of MobileNetV1 as floats, out of the 8-bit network that Google published.

    state = state_dict(content, prefixes)       # content: the file's bytes, as a bytearray

The file is mobilenet_v1_1.0_224_quant_embedding_extractor.tflite of github.com/google-coral/test_data (Apache
2.0). Each of its 27 convolutions has a bias, and no normalization. The program's network has a normalization
behind each, and no bias. So each gets a normalization that changes nothing but adds the bias: with the mean m
and the variance v of the convolution's outputs, gamma = sqrt(v + eps) and beta = bias + m. What the network
computes does not depend on m and v, but Batch Renormalization goes on from them as its moving averages.

tflite_statistics.pth holds m and v of all 10,944 channels. They are of 768 images of CIFAR-100, enlarged to
128 pixels, which it names by the CRC-32 of their pixels; benchmarks/standin/make_weights.py measures them
anew. They are float64, as gamma and beta would else differ from those of the records in the last bit.

The network differs from Google's in two things: it has ReLU for ReLU6, and its padding is symmetric.
"""
import os
import struct

import torch

STATISTICS = os.path.join(os.path.dirname(__file__), "tflite_statistics.pth")
EPS = 1e-5      # of BatchNorm2d

# of images in 0..1, as in utils.py; models/ can be copied without it
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)

CONV_2D, DEPTHWISE_CONV_2D = 3, 4       # kinds of operators, in the schema of .tflite files


def state_dict(content, prefixes, statistics=None):
    """The state_dict, without a classifier: convolutions in float16, normalizations in float32.

    prefixes: what the keys of each convolution begin with. statistics: {"mean", "var"}, float64 of all
    convolutions' channels, one after the other; None: those of tflite_statistics.pth.
    """
    if statistics is None:
        statistics = torch.load(STATISTICS, weights_only=True)

    state = {}
    first = 0
    for prefix, (weight, bias) in zip(prefixes, convolutions(content), strict=True):
        mean = statistics["mean"][first:first + len(bias)]
        var = statistics["var"][first:first + len(bias)]
        first += len(bias)

        state[f"{prefix}.conv.weight"] = weight.half()
        state[f"{prefix}.bn.weight"] = (var + EPS).sqrt().float()
        state[f"{prefix}.bn.bias"] = (bias + mean).float()
        state[f"{prefix}.bn.running_mean"] = mean.float()
        state[f"{prefix}.bn.running_var"] = var.float()
    return state


def convolutions(content):
    """[(weight (c_out, c_in / groups, k, k), bias (c_out,))] of a .tflite file in order, float32.

    The first one is made for this program's images, normalized by ImageNet's mean and deviation; the file's
    are pixels from 0 to 255, less 128, by 128.
    """
    (weight, bias), *others = _convolutions(content)
    scale = 255 * IMAGENET_STD / 128
    shift = (255 * IMAGENET_MEAN - 128) / 128
    bias = bias + (weight.sum((2, 3)) * shift).sum(1)
    weight = weight * scale[:, None, None]
    return [(weight.float(), bias.float()) for weight, bias in [(weight, bias), *others]]


# ---- the file, a flatbuffer; a field's number is its place in the schema of .tflite files ----

def _convolutions(content):
    """The convolutions as the file has them, float64."""
    model = Table(content, 0)
    kinds = [code.number(0, "b") for code in model.tables(1)]
    graph = model.tables(2)[0]
    buffers = model.tables(4)
    tensors = graph.tables(0)

    found = []
    for operator in graph.tables(3):
        kind = kinds[operator.number(0, "I")]
        if kind in (CONV_2D, DEPTHWISE_CONV_2D):
            _, weight, bias = operator.array(1, torch.int32).tolist()
            weight = _floats(tensors[weight], buffers, torch.uint8)
            order = (0, 3, 1, 2) if kind == CONV_2D else (3, 0, 1, 2)       # of (O, H, W, I), (1, H, W, O)
            found.append((weight.permute(order).contiguous(), _floats(tensors[bias], buffers, torch.int32)))
    return found


def _floats(tensor, buffers, dtype):
    """The values that a tensor's whole numbers stand for, float64."""
    shape = tensor.array(0, torch.int32).tolist()
    stored = buffers[tensor.number(2, "I")].array(0, torch.uint8).view(dtype).view(shape)
    quantization = tensor.table(4)
    scale = quantization.array(2, torch.float32).item()
    zero = quantization.array(3, torch.int64).item()
    return (stored.double() - zero) * scale


class Table:
    """A table of a flatbuffer, to which the offset at `place` in `content` points."""

    def __init__(self, content, place):
        self.content = content
        self.place = place + self._read("I", place)

    def number(self, field, form):
        """A number in the form that struct calls so; 0 where it is left out."""
        place = self._field(field)
        return self._read(form, place) if place else 0

    def table(self, field):
        """The Table in a field."""
        return Table(self.content, self._field(field))

    def tables(self, field):
        """The Tables of a field that holds several."""
        start, count = self._vector(field)
        return [Table(self.content, start + 4 * i) for i in range(count)]

    def array(self, field, dtype):
        """The numbers of a field that holds several, as a tensor."""
        start, count = self._vector(field)
        return torch.frombuffer(self.content, dtype=dtype, offset=start, count=count).clone()

    def _vector(self, field):
        place = self._field(field)
        place += self._read("I", place)
        return place + 4, self._read("I", place)

    def _field(self, field):
        """Where a field lies, 0 where it is left out; the table begins with the way back to a list of it."""
        layout = self.place - self._read("i", self.place)
        entry = 4 + 2 * field
        offset = self._read("H", layout + entry) if entry < self._read("H", layout) else 0
        return self.place + offset if offset else 0

    def _read(self, form, place):
        return struct.unpack_from("<" + form, self.content, place)[0]
