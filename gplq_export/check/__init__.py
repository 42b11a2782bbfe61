"""``gplq-export check``: does every file of an export compute what PyTorch computed, from the labels to the engine?

::

    report.py         what a check found, as data: ``parity.json`` and its schema
    capture.py        PyTorch's side: one forward pass with everything that is compared; the noise floors
    graph.py          the other side: where a graph holds which codes; parts of it in a runtime
    forced.py         teacher-forced: fed PyTorch's own tensors, every quantiser, linear and block answers as PyTorch
    free.py           free-running: outputs and codes of the whole network, streamed over all images, resumable
    members.py        what computes: networks in PyTorch, files in runtimes, engines
    images.py         the images
    subject.py        the files, their hashes and precisions
    baseline.py       what holds whatever is quantised: golden outputs, accuracy, the range of FP16
    chain.py          which pairs there are in a folder, which can run here, and all of them in order
    gates.py          what is good enough, and why: ``thresholds.yaml``
    latency.py        times, and the gate on regressions
    command.py        the command line
"""
