"""The smallest product on Hopper's tensor cores that is still tiled: what the ahead-of-time compiler is tried on."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

ROWS, COLUMNS, STEP = 64, 128, 64


def product(a, b):
    """``a [m, k] @ b [n, k].T`` in the dtype of ``a``; a tile per block, no pipeline."""
    (m, k), n = a.shape, b.shape[0]
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def body(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, barrier):
        rows = pl.ds(lax.axis_index("i") * ROWS, ROWS)
        columns = pl.ds(lax.axis_index("j") * COLUMNS, COLUMNS)

        def accumulate(acc):
            def step(index, _):
                inner = pl.ds(index * STEP, STEP)
                plgpu.copy_gmem_to_smem(a_gmem.at[rows, inner], a_smem, barrier)
                plgpu.copy_gmem_to_smem(b_gmem.at[columns, inner], b_smem, barrier)
                plgpu.barrier_wait(barrier)
                plgpu.wgmma(acc, a_smem, plgpu.transpose_ref(b_smem, (1, 0)))
                plgpu.wgmma_wait(0)
                return _

            lax.fori_loop(0, k // STEP, step, None)
            return acc[...]

        out_smem[...] = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS), jnp.float32)).astype(a.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), a.dtype),
        grid=(m // ROWS, n // COLUMNS),
        grid_names=("i", "j"),
        scratch_types=[
            plgpu.SMEM((ROWS, STEP), a.dtype, transforms=transforms),
            plgpu.SMEM((COLUMNS, STEP), a.dtype, transforms=transforms),
            plgpu.SMEM((ROWS, COLUMNS), a.dtype, transforms=transforms),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(a, b)
