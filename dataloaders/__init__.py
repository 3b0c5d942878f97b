"""Tables by name. A new entry is one new file (or function) and one line here.

Data sets: functions (*, knobs) -> FrameIndex; image sets, for classification: (*, knobs) -> ImageSet. Corruptions:
functions (image uint8 [H, W, 3], severity 1..5, numpy Generator) -> uint8 [H, W, 3]; the 15 common ones, and the 4
extra ones that were published beside them.
"""

DATASETS = {
    "a2d2": "dataloaders.a2d2:a2d2",
    "folder": "dataloaders.folder:folder",
    "cityscapes": "dataloaders.cityscapes:cityscapes",
    "roadscenes": "dataloaders.roadscenes:roadscenes",
}

IMAGE_SETS = {
    "cifar": "dataloaders.cifar:cifar",
    "tiny_imagenet": "dataloaders.tiny_imagenet:tiny_imagenet",
    "imagenet": "dataloaders.imagenet:imagenet",
    "mnist": "dataloaders.mnist:mnist",
    "digits": "dataloaders.digits:digits",
}

CORRUPTIONS = {
    "gaussian_noise": "dataloaders.corruptions:gaussian_noise",
    "shot_noise": "dataloaders.corruptions:shot_noise",
    "impulse_noise": "dataloaders.corruptions:impulse_noise",
    "defocus_blur": "dataloaders.corruptions:defocus_blur",
    "glass_blur": "dataloaders.corruptions:glass_blur",
    "motion_blur": "dataloaders.corruptions:motion_blur",
    "zoom_blur": "dataloaders.corruptions:zoom_blur",
    "snow": "dataloaders.corruptions:snow",
    "frost": "dataloaders.corruptions:frost",
    "fog": "dataloaders.corruptions:fog",
    "brightness": "dataloaders.corruptions:brightness",
    "contrast": "dataloaders.corruptions:contrast",
    "elastic_transform": "dataloaders.corruptions:elastic_transform",
    "pixelate": "dataloaders.corruptions:pixelate",
    "jpeg_compression": "dataloaders.corruptions:jpeg_compression",
}

EXTRA_CORRUPTIONS = {
    "speckle_noise": "dataloaders.corruptions:speckle_noise",
    "gaussian_blur": "dataloaders.corruptions:gaussian_blur",
    "spatter": "dataloaders.corruptions:spatter",
    "saturate": "dataloaders.corruptions:saturate",
}
