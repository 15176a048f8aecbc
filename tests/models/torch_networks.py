"""PyTorch networks under the names of published checkpoints, for tests; imports PyTorch, which is optional."""

import torch
from torch import nn
from torch.nn import functional


def randomise(model, seed):
    """Gives all parameters and running averages random values with which activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim in (2, 4):
            tensor.copy_(noise / tensor[0].numel() ** 0.5)
        else:
            tensor.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


class _Block(nn.Module):
    def __init__(self, in_planes, planes, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding, self.projection = stride, planes - in_planes, shortcut
        if shortcut and (stride != 1 or self.padding):
            setattr(
                self,
                shortcut,
                nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.projection and hasattr(self, self.projection):
            return functional.relu(y + getattr(self, self.projection)(x))
        if self.stride != 1:
            half = self.padding // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """`shortcut` is the name of projections, or none: zero padding."""

    def __init__(self, blocks, widths, num_classes=10, head="fc", shortcut=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        in_planes = widths[0]
        for stage, (num_blocks, planes) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for block in range(num_blocks):
                layers.append(_Block(in_planes, planes, 2 if stage and not block else 1, shortcut))
                in_planes = planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        setattr(self, head, nn.Linear(in_planes, num_classes))
        self.num_stages, self.head = len(blocks), head

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return getattr(self, self.head)(x.mean((2, 3)))


def _conv_bn(in_planes, planes, size, stride):
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(in_planes, planes, size, stride, size // 2, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(planes))
    return layers


class _RepVGGBlock(nn.Module):
    def __init__(self, in_planes, planes, stride, deploy):
        super().__init__()
        self.deploy = deploy
        if deploy:
            self.rbr_reparam = nn.Conv2d(in_planes, planes, 3, stride, 1)
            return
        self.rbr_identity = nn.BatchNorm2d(planes) if stride == 1 and planes == in_planes else None
        self.rbr_dense = _conv_bn(in_planes, planes, 3, stride)
        self.rbr_1x1 = _conv_bn(in_planes, planes, 1, stride)

    def forward(self, x):
        if self.deploy:
            return functional.relu(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return functional.relu(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class RepVGG(nn.Module):
    def __init__(self, blocks, widths, strides=(2, 2, 2, 2, 2), num_classes=10, deploy=False):
        super().__init__()
        self.stage0 = _RepVGGBlock(3, widths[0], strides[0], deploy)
        in_planes = widths[0]
        for stage, num_blocks in enumerate(blocks, 1):
            layers = []
            for block in range(num_blocks):
                layers.append(_RepVGGBlock(in_planes, widths[stage], 1 if block else strides[stage], deploy))
                in_planes = widths[stage]
            setattr(self, f"stage{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(in_planes, num_classes)
        self.num_stages = len(blocks)

    def forward(self, x):
        for stage in range(self.num_stages + 1):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.mean((2, 3)))


class _Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(*qkv)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class _TimmBlock(nn.Module):
    def __init__(self, width, num_heads, mlp_width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    def __init__(self, image_size, patch_size, width, depth, num_heads, mlp_width, num_classes=10):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.Sequential(*[_TimmBlock(width, num_heads, mlp_width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def _modules(**modules):
    return nn.ModuleDict(modules)


class _HuggingFaceLayer(nn.Module):
    def __init__(self, width, num_heads, mlp_width):
        super().__init__()
        self.num_heads = num_heads
        self.attention = _modules(
            attention=_modules(
                query=nn.Linear(width, width), key=nn.Linear(width, width), value=nn.Linear(width, width)
            ),
            output=_modules(dense=nn.Linear(width, width)),
        )
        self.intermediate = _modules(dense=nn.Linear(width, mlp_width))
        self.output = _modules(dense=nn.Linear(mlp_width, width))
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        batch, tokens, width = x.shape
        normalised = self.layernorm_before(x)
        parts = [
            self.attention["attention"][name](normalised).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        scores = parts[0] @ parts[1].transpose(2, 3) / (width / self.num_heads) ** 0.5
        context = (scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.attention["output"]["dense"](context)
        hidden = functional.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)


class HuggingFaceViT(nn.Module):
    def __init__(self, image_size, patch_size, width, depth, num_heads, mlp_width, num_classes=10):
        super().__init__()
        embeddings = _modules(patch_embeddings=_modules(projection=nn.Conv2d(3, width, patch_size, patch_size)))
        embeddings.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, width)))
        tokens = (image_size // patch_size) ** 2 + 1
        embeddings.register_parameter("position_embeddings", nn.Parameter(torch.zeros(1, tokens, width)))
        layers = nn.ModuleList([_HuggingFaceLayer(width, num_heads, mlp_width) for _ in range(depth)])
        self.vit = _modules(
            embeddings=embeddings, encoder=_modules(layer=layers), layernorm=nn.LayerNorm(width, eps=1e-12)
        )
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x):
        embeddings = self.vit["embeddings"]
        x = embeddings["patch_embeddings"]["projection"](x).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.cls_token.expand(x.shape[0], -1, -1), x], 1) + embeddings.position_embeddings
        for layer in self.vit["encoder"]["layer"]:
            x = layer(x)
        return self.classifier(self.vit["layernorm"](x)[:, 0])
