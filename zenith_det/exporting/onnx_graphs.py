"""What goes before and after the network in an exported ONNX file, in ONNX's own text form.

Before: the resize, as Pillow computes it (two passes, each rounded to 8 bits), normalization and padding. After:
keypoints at the peaks of their heatmaps. With these in the file, whoever runs it needs no code of this toolkit.
"""

from __future__ import annotations

from collections.abc import Sequence

from zenith_det.data.pixel_formats import RGB_TO_YUV

#: Of the operators' versions; 18 is what PyTorch's exporter writes.
OPSET = 18
IR_VERSION = 10

_HEAD = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>'

# The triangle filter of Pillow (Resample.c, bilinear), as a matrix (out, in): with out / in below 1 its support grows,
# so that every pixel counts. Rows are normalized, and rounded to Pillow's 22 bits: where weights are sixths, a sum
# often lies at a half, and that rounding decides. In double precision sums of those are exact.
_FILTER = """
  {n}_scale = Div ({n}_in, {n}_out)
  {n}_stretch = Max ({n}_scale, one)
  {n}_out_i = Cast <to = 7> ({n}_out)
  {n}_in_i = Cast <to = 7> ({n}_in)
  {n}_to = Range (zero_i, {n}_out_i, one_i)
  {n}_from = Range (zero_i, {n}_in_i, one_i)
  {n}_to_d = Cast <to = 11> ({n}_to)
  {n}_from_d = Cast <to = 11> ({n}_from)
  {n}_middle = Add ({n}_to_d, half)
  {n}_centre = Mul ({n}_middle, {n}_scale)
  {n}_column = Unsqueeze ({n}_centre, axis_1)
  {n}_pixel = Add ({n}_from_d, half)
  {n}_away = Sub ({n}_pixel, {n}_column)
  {n}_far = Abs ({n}_away)
  {n}_share = Div ({n}_far, {n}_stretch)
  {n}_height = Sub (one, {n}_share)
  {n}_tap = Max ({n}_height, zero)
  {n}_sum = ReduceSum ({n}_tap, axis_1)
  {n}_even = Div ({n}_tap, {n}_sum)
  {n}_bits = Mul ({n}_even, precision)
  {n}_bits_up = Add ({n}_bits, half)
  {n}_bits_whole = Floor ({n}_bits_up)
  {n}_matrix = Div ({n}_bits_whole, precision)
"""


_BYTES = ", double high = {255.0}"
# In two passes, each rounded to 8 bits.
_RESIZE_BYTES = """
  pixels = Cast <to = 11> (planes)
  columns_turned = Transpose <perm = [1, 0]> (columns_matrix)
  across = MatMul (pixels, columns_turned)
  across_up = Add (across, half)
  across_whole = Floor (across_up)
  across_byte = Clip (across_whole, zero, high)
  down = MatMul (rows_matrix, across_byte)
  down_up = Add (down, half)
  down_whole = Floor (down_up)
  down_byte = Clip (down_whole, zero, high)
  values = Cast <to = 1> (down_byte)
"""
_ORDERED = (_BYTES, "\n  planes = Transpose <perm = [0, 3, 1, 2]> (images)" + _RESIZE_BYTES)
# Pillow's grey: with weights of 16 bits, rounded.
_GREY = (
    _BYTES
    + ", int64[1] axis_last = {-1}, double[3] weights = {7471.0, 38470.0, 19595.0}, double bits = {65536.0}",
    """
  colours = Cast <to = 11> (images)
  weighted = Mul (colours, weights)
  sum = ReduceSum (weighted, axis_last)
  share = Div (sum, bits)
  share_up = Add (share, half)
  grey = Floor (share_up)
  planes = Transpose <perm = [0, 3, 1, 2]> (grey)"""
    + _RESIZE_BYTES,
)
_TO_YUV = ", ".join(repr(float(weight)) for weight in RGB_TO_YUV.T[::-1].flatten())
_YUV = (
    f", float white = {{255.0}}, float[3, 3] to_yuv = {{{_TO_YUV}}}",
    """
  colours = Cast <to = 1> (images)
  share = Div (colours, white)
  yuv = MatMul (share, to_yuv)
  planes = Transpose <perm = [0, 3, 1, 2]> (yuv)
  outer = Shape <end = 2> (planes)
  target = Concat <axis = 0> (outer, resized)
  values = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (planes, , , target)
""",
)


def preparing(
    mean: Sequence[float],
    std: Sequence[float],
    short: int,
    longest: int,
    divisibility: int,
    image_format: str = "BGR",
) -> str:
    """The graph from images to the network's input.

    Input ``images``: uint8 ``(N, H, W, 3)``. Outputs: ``batch_`` float ``(N, C, h, w)``, ``input_size`` and
    ``original_size``, float ``(2,)``: the arguments of :meth:`.export_module.ExportableRCNN.forward`.

    Args:
        mean, std: of the network's channels.
        short, longest: ``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``; see
            :func:`~.input_pipeline.shortest_edge_size`.
        divisibility: of the network's input.
        image_format: ``INPUT.FORMAT``. For ``L`` and ``YUV-BT.601`` the images are BGR, and become grey or YUV here.
    """
    constants, values = {"L": _GREY, "YUV-BT.601": _YUV}.get(image_format, _ORDERED)
    channels = len(mean)
    limits = ""
    if short:
        limits = f"double short = {{{short}.0}}, double longest = {{{longest}.0}},"
        sizes = """
  least = Min (rows_in, columns_in)
  wanted = Div (short, least)
  rows_1 = Mul (wanted, rows_in)
  columns_1 = Mul (wanted, columns_in)
  most = Max (rows_1, columns_1)
  too_long = Greater (most, longest)
  room = Div (longest, most)
  shrink = Where (too_long, room, one)
  rows_2 = Mul (rows_1, shrink)
  columns_2 = Mul (columns_1, shrink)
"""
    else:
        sizes = "\n  rows_2 = Identity (rows_in)\n  columns_2 = Identity (columns_in)\n"
    return f"""{_HEAD}
prepare (uint8[batch, height, width, 3] images)
  => (float[batch, {channels}, h, w] batch_, float[2] input_size, float[2] original_size)
<double half = {{0.5}}, double one = {{1.0}}, double zero = {{0.0}}, double precision = {{4194304.0}}, {limits}
 int64 zero_i = {{0}}, int64 one_i = {{1}}, int64[1] axis_1 = {{1}}, int64[1] axis_0 = {{0}},
 int64[1] divide = {{{divisibility}}},
 int64[2] none = {{0, 0}}, int64[2] hw = {{1, 2}},
 float[1, {channels}, 1, 1] mean = {{{_numbers(mean)}}},
 float[1, {channels}, 1, 1] std = {{{_numbers(std)}}}{constants}>
{{
  shape = Shape (images)
  size = Gather (shape, hw)
  original_size = Cast <to = 1> (size)
  size_d = Cast <to = 11> (size)
  rows_in = Gather (size_d, zero_i)
  columns_in = Gather (size_d, one_i)
{sizes}
  rows_3 = Add (rows_2, half)
  columns_3 = Add (columns_2, half)
  rows_4 = Floor (rows_3)
  columns_4 = Floor (columns_3)
  rows_out = Max (rows_4, one)
  columns_out = Max (columns_4, one)
{_FILTER.format(n="rows")}
{_FILTER.format(n="columns")}
  rows_out_1 = Unsqueeze (rows_out_i, axis_0)
  columns_out_1 = Unsqueeze (columns_out_i, axis_0)
  resized = Concat <axis = 0> (rows_out_1, columns_out_1)
  input_size = Cast <to = 1> (resized)
{values}
  centred = Sub (values, mean)
  normal = Div (centred, std)
  over = Mod (resized, divide)
  left_over = Sub (divide, over)
  missing = Mod (left_over, divide)
  pads = Concat <axis = 0> (none, none, none, missing)
  batch_ = Pad <mode = "constant"> (normal, pads)
}}"""


#: The graph from heatmaps to keypoints: see :func:`~.keypoints.heatmaps_to_keypoints`. ``input_boxes`` are those of
#: the network's input, ``scale`` (x, y) brings their pixels to the image's.
DECODING = f"""{_HEAD}
decode (float[M, K, S, S] heatmaps, float[M, 4] input_boxes, float[2] scale)
  => (float[M, K, 3] keypoints)
<int64 zero_i = {{0}}, bool yes = {{1}}, int64[1] start = {{0}}, int64[1] middle = {{2}},
 int64[1] end = {{4}}, int64[1] axis_0 = {{0}}, int64[1] axis_1 = {{1}}, int64[1] axis_last = {{-1}},
 float one = {{1.0}}, float half = {{0.5}}, int64[2] last_two = {{-2, -1}}, int64[3] grouped = {{0, 0, -1}},
 int64[2] turned = {{1, 0}},
 int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] open = {{-1}}>
{{
  corner = Slice (input_boxes, start, middle, axis_1)
  far = Slice (input_boxes, middle, end, axis_1)
  extent = Sub (far, corner)
  sides = Max (extent, one)
  whole = Ceil (sides)
  correction = Div (sides, whole)
  whole_i = Cast <to = 7> (whole)
  shape = Shape (heatmaps)
  count = Gather (shape, zero_i)
  kinds = Slice (shape, axis_1, two, axis_0)
  each = Loop (count, yes) <body = of_box (int64 i, bool go) => (bool go_on, float[K, 3] points) {{
    go_on = Identity (go)
    index = Unsqueeze (i, axis_0)
    map = Gather (heatmaps, index)
    box_wh = Gather (whole_i, i)
    box_hw = Gather (box_wh, turned)
    map_shape = Shape (map)
    outer = Slice (map_shape, start, two, axis_0)
    target = Concat <axis = 0> (outer, box_hw)
    large = Resize <mode = "cubic", coordinate_transformation_mode = "half_pixel", cubic_coeff_a = -0.75>
      (map, , , target)
    rows = Reshape (large, grouped)
    flat = Squeeze (rows, axis_0)
    peak = ReduceMax <keepdims = 1> (flat, axis_last)
    at = ArgMax <axis = -1, keepdims = 1> (flat)
    width = Slice (box_wh, start, axis_1, axis_0)
    x_i = Mod (at, width)
    y_i = Div (at, width)
    cell_i = Concat <axis = 1> (x_i, y_i)
    cell = Cast <to = 1> (cell_i)
    centre = Add (cell, half)
    shrink = Gather (correction, i)
    moved = Mul (centre, shrink)
    origin = Gather (corner, i)
    place = Add (moved, origin)
    xy = Mul (place, scale)
    cells = Squeeze (map, axis_0)
    peak_3 = Unsqueeze (peak, axis_last)
    below = Sub (cells, peak_3)
    powers = Exp (below)
    partition = ReduceSum <keepdims = 0> (powers, last_two)
    score = Reciprocal (partition)
    score_2 = Unsqueeze (score, axis_last)
    points = Concat <axis = 1> (xy, score_2)
  }}>
  wanted = Concat <axis = 0> (open, kinds, three)
  keypoints = Reshape (each, wanted)
}}"""


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)
