"""Trained policies as files that act without this package: ONNX, torch.export, TorchScript."""
