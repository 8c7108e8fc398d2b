"""SViT-S UperNet on ADE20K, 160k. Paper: mIoU 48.6, multi-scale (``--tta``) 49.0."""

_base_ = './upernet/svit-s_upernet_8xb2-160k_ade20k-512x512.py'
