"""What makes mmsvit fit the other libraries: mmcv without compiled ops, private parts of MMEngine."""
