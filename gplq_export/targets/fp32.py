"""The network without quantisers."""

import onnx_ir as ir

from gplq_export.targets.base import GraphWriter, Quantizer, Target, Weight


class Float32(Target):
    """The same network without quantisers: what the same engine costs, and computes, in floating point."""

    name = "fp32"
    quantizes = False

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """Nothing: the input itself. A factor in front of the quantiser goes into the weight behind it."""
        return quantizer.x

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """The weight that the codes stand for."""
        values = weight.floating()
        return writer.floating(f"{weight.name}.weight", values.T if values.ndim == 2 else values)
