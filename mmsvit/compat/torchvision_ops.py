"""mmcv's compiled operations by torchvision and torch, where mmcv was installed without them.

This file is imported under the name ``mmcv._ext`` (see ``mmcv_ext.py``), so the functions
have the names and the calling conventions of mmcv's extension, results written into given
tensors included. What is not here raises on use.
"""

from __future__ import annotations

from collections.abc import Callable
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
        rest = torch.tensor(
            _drop(rest.tolist(), (scores[rest] < min_score).tolist()), dtype=torch.int64
        )
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


def _drop(items: list[int], dropped: list[bool]) -> list[int]:
    """Remove items by putting the last in their place, as mmcv does."""
    pairs, i = list(zip(items, dropped)), 0
    while i < len(pairs):
        if pairs[i][1]:
            pairs[i] = pairs[-1]
            pairs.pop()
        else:
            i += 1
    return [item for item, _ in pairs]


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
    size = (aligned_height, aligned_width)
    rois = rois.to(input.dtype)
    output.copy_(
        torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)
    )


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
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


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
    with torch.enable_grad():
        input = input.detach().requires_grad_()
        loss = _sigmoid_focal_loss(input, target, weight, gamma, alpha).sum()
        grad_input.copy_(torch.autograd.grad(loss, input)[0])


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention by mmcv's own PyTorch form of it."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients, by computing the forward pass again."""
    with torch.enable_grad():
        inputs = [
            tensor.detach().requires_grad_()
            for tensor in (value, sampling_locations, attention_weights)
        ]
        output = ms_deform_attn_forward(
            inputs[0],
            value_spatial_shapes,
            value_level_start_index,
            inputs[1],
            inputs[2],
            im2col_step,
        )
        grads = torch.autograd.grad(output, inputs, grad_output)
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        target.copy_(grad)


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: Tensor,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    # torchvision reads the groups off the shapes.
    return torchvision.ops.deform_conv2d(
        input, offset, weight, bias, stride, padding, dilation, mask
    )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution, written into ``output``."""
    place = ((dH, dW), (padH, padW), (dilationH, dilationW))
    output.copy_(_deform_conv(input, weight, None, offset, None, *place))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients for map and offsets."""
    place = ((dH, dW), (padH, padW), (dilationH, dilationW))
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (input, offset)]
        output = _deform_conv(inputs[0], weight.detach(), None, inputs[1], None, *place)
        grads = torch.autograd.grad(output, inputs, grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient for the weights."""
    place = ((dH, dW), (padH, padW), (dilationH, dilationW))
    with torch.enable_grad():
        # The convolution is linear in its weights: any will do to differentiate by them.
        weight = torch.zeros_like(grad_weight).requires_grad_()
        output = _deform_conv(input.detach(), weight, None, offset.detach(), None, *place)
        (grad,) = torch.autograd.grad(output, weight, grad_output)
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
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution, written into ``output``."""
    place = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    output.copy_(_deform_conv(input, weight, bias if with_bias else None, offset, mask, *place))


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
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write all gradients."""
    place = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    tensors = (input, weight, offset, mask) + ((bias,) if with_bias else ())
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    targets += [grad_bias] if with_bias else []
    with torch.enable_grad():
        x, w, o, m, *b = inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        output = _deform_conv(x, w, b[0] if b else None, o, m, *place)
        grads = torch.autograd.grad(output, inputs, grad_output)
    for target, grad in zip(targets, grads):
        target.copy_(grad)
