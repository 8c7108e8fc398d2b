"""mmcv's compiled operations by torchvision and torch, where mmcv was installed without them.

This file is imported under the name ``mmcv._ext`` (see ``mmcv_ext.py``), so the functions
have the names and take the arguments of mmcv's extension, as mmcv gives them: most by
position, the sizes of a convolution by name, and tensors to write results into. What is not
here raises on use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

__version__ = f'torchvision {torchvision.__version__}'


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"the operation '{name}' needs mmcv's compiled ops, which are not installed; mmsvit's "
            'stand-in for them has those that torchvision and torch have. Build mmcv, after torch '
            "and without pip's isolation; the last lines of requirements.txt "
            "(requirements-openmmlab.txt for OpenMMLab's own releases) say how"
        )

    return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes ``(N, 4)`` that non-maximum suppression keeps, best first, int64."""
    if offset:  # A box with offset 1 is one pixel wider and higher than its corners say.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # Sorted here, as mmcv sorts: among equal scores torchvision would keep another order.
    order = scores.sort(descending=True)[1]
    ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float32)
    return order[torchvision.ops.nms(boxes[order].float(), ranks, iou_threshold)]


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS: lower the scores of boxes near better ones, method 0 naive, 1 linear, 2 Gaussian.

    Writes boxes and scores ``(N, 5)`` into ``dets`` and returns the indices of the kept.
    """
    areas = (boxes[:, 2] - boxes[:, 0] + offset) * (boxes[:, 3] - boxes[:, 1] + offset)
    kept: list[Tensor] = []
    scores, rest = scores.clone(), torch.arange(len(boxes))
    while len(rest):
        # The best goes first, what was first takes its place: mmcv's order among equals.
        # Comparing with NaN, which a degenerate box can score, it never finds a better one.
        ranks = scores[rest]
        ranks[1:] = ranks[1:].nan_to_num(-torch.inf)
        first = ranks.argmax()
        best, rest[first] = rest[first].clone(), rest[0].clone()
        rest = rest[1:]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        corner = torch.minimum(boxes[rest, 2:], boxes[best, 2:])
        sides = (corner - torch.maximum(boxes[rest, :2], boxes[best, :2]) + offset).clamp(min=0)
        inner = sides.prod(dim=1)
        iou = inner / (areas[rest] + areas[best] - inner)
        if method == 0:
            weight = 1 - (iou >= iou_threshold).to(scores)
        elif method == 1:
            weight = torch.where(iou >= iou_threshold, 1 - iou, 1)
        else:
            weight = torch.exp(-iou * iou / sigma)
        scores[rest] *= weight
        rest = _drop(rest, scores[rest] < min_score)
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


def _drop(items: Tensor, dropped: Tensor) -> Tensor:
    """Remove items ``(N,)`` by putting the last in their place, as mmcv does."""
    pairs, i = list(zip(items.tolist(), dropped.tolist())), 0
    while i < len(pairs):
        if pairs[i][1]:
            pairs[i] = pairs[-1]
            pairs.pop()
        else:
            i += 1
    return torch.tensor([item for item, _ in pairs], dtype=items.dtype)


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "roi_align with pool_mode='max' needs mmcv's compiled ops; torchvision has 'avg' only"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool RoIs ``(K, 5)`` of a map ``(N, C, H, W)`` into ``output``, whatever its layout in memory."""
    _require_average(pool_mode)
    size, rois = (aligned_height, aligned_width), rois.to(input.dtype)
    pooled = torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient for the map into ``grad_input``."""
    _require_average(pool_mode)
    rois, backward = rois.to(grad_output.dtype), torch.ops.torchvision._roi_align_backward
    sizes = (spatial_scale, aligned_height, aligned_width, *grad_input.shape)
    grad_input.copy_(backward(grad_output, rois, *sizes, sampling_ratio, aligned))


def _write_gradients(
    targets: Sequence[Tensor], function: Callable, tensors: Sequence[Tensor], grad: Tensor
) -> None:
    """Write the gradients of a function for these tensors into ``targets``, by computing it again."""
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        grads = torch.autograd.grad(function(*tensors), tensors, grad)
    for target, one in zip(targets, grads):
        target.copy_(one)


def _sigmoid_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    # mmcv's labels: the class of each row, or the number of classes for background.
    positive = F.one_hot(target, input.shape[1] + 1)[:, :-1].to(input.dtype)
    loss = torchvision.ops.sigmoid_focal_loss(input, positive, alpha, gamma)
    return loss * weight if weight.numel() else loss


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of logits ``(N, C)`` for labels ``(N,)`` into ``output``, element by element."""
    output.copy_(_sigmoid_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each element of the loss into ``grad_input``."""

    def loss(x: Tensor) -> Tensor:
        return _sigmoid_focal_loss(x, target, weight, gamma, alpha)

    _write_gradients([grad_input], loss, [input], torch.ones_like(input))


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, places: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Multi-scale deformable attention by mmcv's own PyTorch form of it."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, places, weights)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    places: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    *targets: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients for value, places and weights."""

    def attend(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(value, shapes, starts, places, weights, im2col_step)

    _write_gradients(targets, attend, [value, places, weights], grad_output)


_PLAIN = dict(stride=('dH', 'dW'), padding=('padH', 'padW'), dilation=('dilationH', 'dilationW'))
_MODULATED = dict(
    stride=('stride_h', 'stride_w'),
    padding=('pad_h', 'pad_w'),
    dilation=('dilation_h', 'dilation_w'),
)


_OF_SHAPES = {'kW', 'kH', 'kernel_w', 'kernel_h', 'group', 'deformable_group', 'im2col_step'}


def _deform_conv(names: dict[str, tuple[str, str]], sizes: dict[str, int]) -> Callable[..., Tensor]:
    """The convolution of torchvision with mmcv's sizes. It reads kernel and groups off the shapes."""
    unknown = sizes.keys() - {name for pair in names.values() for name in pair} - _OF_SHAPES
    if unknown:
        raise TypeError(f'unexpected sizes {sorted(unknown)}')
    settings = {key: (sizes[h], sizes[w]) for key, (h, w) in names.items()}
    return partial(torchvision.ops.deform_conv2d, **settings)


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *buffers: Tensor, **sizes: int
) -> None:
    """Deformable convolution, written into ``output``."""
    output.copy_(_deform_conv(_PLAIN, sizes)(input, offset, weight))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    *buffers: Tensor,
    **sizes: int,
) -> None:
    """Write the gradients for map and offsets."""
    conv = partial(_deform_conv(_PLAIN, sizes), weight=weight.detach())
    _write_gradients([grad_input, grad_offset], conv, [input, offset], grad_output)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    *buffers: Tensor,
    scale: float,
    **sizes: int,
) -> None:
    """Add ``scale`` times the gradient for the weights."""
    conv = partial(_deform_conv(_PLAIN, sizes), input.detach(), offset.detach())
    # The convolution is linear in its weights: any will do to differentiate by them.
    grad = torch.zeros_like(grad_weight)
    _write_gradients([grad], conv, [grad], grad_output)
    grad_weight.add_(grad, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Modulated deformable convolution, written into ``output``."""
    conv = _deform_conv(_MODULATED, sizes)
    output.copy_(conv(input, offset, weight, bias if with_bias else None, mask=mask))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Write all gradients."""
    conv = _deform_conv(_MODULATED, sizes)
    targets = [grad_input, grad_offset, grad_weight, grad_mask, grad_bias]
    tensors = [input, offset, weight, mask, *([bias] if with_bias else [])]

    def convolve(x: Tensor, o: Tensor, w: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
        return conv(x, o, w, b, mask=m)

    _write_gradients(targets, convolve, tensors, grad_output)
