"""What the streams that need no CORe50 share, with the interface of data_loader.CORE50.

Iterating gives (train_x uint8 (n, H, W, 3), train_y int64 (n,)) for each batch, `get_test_set(stride)` the test set in
the same form. `streams.demo` draws its images, `streams.folder` reads your own.

Uses data_loader, numpy.
"""
import numpy as np

from data_loader import DataError


class Stream:
    """A stream of batches; each iter() starts anew at start_batch. Subclasses give _read_batch and _read_test.

    cumulative: batch i holds the images of the batches 0 .. i. DataError if there is no batch `start_batch`.
    """

    def __init__(self, batches, start_batch, cumulative=False):
        if not isinstance(start_batch, int) or start_batch not in range(batches):
            raise DataError(f"start_batch {start_batch!r} is not in the stream: choose 0 to {batches - 1}")
        self.start_batch, self.cumulative, self._batches = start_batch, cumulative, batches

    def __len__(self):
        """Number of batches that iterating gives: those from start_batch on."""
        return self._batches - self.start_batch

    def __iter__(self):
        return (self.read_batch(i) for i in range(self.start_batch, self._batches))

    def read_batch(self, i):
        """Batch i of the stream: uint8 (n, H, W, 3), int64 (n,)."""
        if not self.cumulative:
            return self._read_batch(i)
        x, y = zip(*(self._read_batch(k) for k in range(i + 1)), strict=True)
        return np.concatenate(x), np.concatenate(y)

    def get_test_set(self, stride=1):
        """Every stride-th test image (1 = all): uint8 (n, H, W, 3), int64 (n,); sorted by label."""
        if not isinstance(stride, int) or stride < 1:
            raise DataError(f"test stride {stride!r} is no positive number: choose 1 (all images) or more")
        return self._read_test(stride)
